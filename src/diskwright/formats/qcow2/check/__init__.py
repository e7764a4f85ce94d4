"""Checking: what the tables refer to, counted, beside what the reference counts say."""
