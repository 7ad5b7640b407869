"""From one run to the next: lora.py (adapters beside frozen weights), runs.py (a saved run, read)."""
