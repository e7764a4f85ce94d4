"""Repair: tables and clusters in places of their own, then reference counts and flags."""
