"""Compose, check and launch: everything between the command line and the rooms."""
