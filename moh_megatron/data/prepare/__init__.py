"""Raw text becomes a dataset: tokenizer, tokens, manifest."""
