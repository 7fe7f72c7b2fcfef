"""Figures as plain plotly dictionaries, one kind a file.

Colours are names (`@1` to `@8`, `@ink`, `@muted`, `@grid`) that the page replaces by those of its theme.
"""
