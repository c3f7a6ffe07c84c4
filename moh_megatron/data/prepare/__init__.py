"""Makes datasets from raw text: tokenizer, tokens, manifest."""
