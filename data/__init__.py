"""TOFU's splits (`tofu`), prompts and token ids (`prompts`), batches, the built-in set (`make_builtin`)."""
