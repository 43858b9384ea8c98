"""unime-ray: adapt universal multimodal retrieval to your own corpus with an MLLM as judge, on Ray.

Importing the package imports neither torch nor ray; each stage imports what it needs.
"""

__version__ = "0.1.0"
