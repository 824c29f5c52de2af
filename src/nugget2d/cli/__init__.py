"""The command line: one module per command, assembled in app.py; torch is imported late."""
