"""Names that the modules about tokenizers share: files, end-of-document tokens, SentencePiece's sign for a space."""

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
SENTENCEPIECE_SUFFIX = ".model"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE, SENTENCEPIECE_MODEL)
EOS_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>")
"""What ends a document where no file says it; the first that the vocabulary has."""
SPACE = "\u2581"
"""SentencePiece's sign for a space. U+2581 in a text is decoded as a space, as SentencePiece does: the only loss."""
WORD = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"
"""Regular expression of a word: its spaces and what follows them."""
LEADING_SPACES = r"\A +"
"""Regular expression of the spaces that a text begins with, in the syntax of the tokenizers library."""
