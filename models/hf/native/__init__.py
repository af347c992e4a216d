"""One file per architecture of Hugging Face transformers; each registers itself."""
