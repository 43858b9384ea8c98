"""Retrieve then rerank, served on Ray Serve: one HTTP ingress, an encoder, a retriever and a reranker.

`service` holds what a request does and knows no Ray; `deployments` puts each stage into a deployment of its own.
"""
