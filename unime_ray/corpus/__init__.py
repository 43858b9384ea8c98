"""The corpus: readers (one file a format), the image policy, ids, and random access to what was read."""
