"""Operators: each file holds one operator, its plain torch definition and its fast backends."""
