"""`python -m demo`: three hundred orders at once, and the proof from the database that every promise held."""
