"""TOFU's splits, prompts and token ids, batches, the built-in set, the instances of Section 4."""
