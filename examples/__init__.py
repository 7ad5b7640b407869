"""Rows to fine-tune a small model on, and worked changes to the code (python -m examples.NAME)."""
