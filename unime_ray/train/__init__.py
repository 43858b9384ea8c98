"""Training of embedders and rerankers on mined hard negatives, with Ray Train. Importing this imports no torch."""
