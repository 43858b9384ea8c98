"""The stages on Ray Data: ingest, embed, retrieve, judge, select."""
