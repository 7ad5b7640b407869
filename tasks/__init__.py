"""Examples with right answers, put to a model: tasks.py (what is asked), scores.py (how answers are scored)."""
