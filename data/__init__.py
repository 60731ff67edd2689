"""Everything about data: TOFU's splits (`tofu`), prompts and token ids (`prompts`), batches (`batches`), the built-in
set (`make_builtin`)."""
