"""models: load a vision-language model, encode prompts and media for it, and answer, dense or sparse.

The only room that knows transformers and peft (export writes their folders, too).
"""
