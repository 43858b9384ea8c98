"""Vision-language models behind the method: backbone, embedder, judges, reranker, low-rank adaptation. No Ray here.

    names        what a model name in a config stands for, and the revision a manifest records
    pixels       encoded picture -> patches          tokens    text and pictures -> token ids with M-RoPE positions
    vision       picture features, batched            attention  suffixes that look at a shared prefix
    families     what tells one family of checkpoints from another: prompt, pooling, image budget, module names
    loading      what can be known of a checkpoint without its weights
    backbone     all of the above around one checkpoint
    embedder     unit vectors                         judge      Yes/No scores (engines: judge_transformers, oracle)
    reranker     listwise and pointwise order         lora       adapters and merged checkpoints

Importing this package imports no torch; its modules do.
"""
