"""Serving: server.py (HTTP and the page), openai_api.py (requests and answers), batching.py (rows in one batch)."""
