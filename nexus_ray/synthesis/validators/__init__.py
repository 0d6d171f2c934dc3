"""Checks of what a row claims: by its source, by running it, by arithmetic, by agreement, by a measured judge."""
