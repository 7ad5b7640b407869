"""Text to batches: tokenizer.py (text <-> ids), prepare.py (text -> shards), shards.py (files), loader.py (batches)."""
