"""The numbers for people: terminal, Markdown, LaTeX, plots, one HTML page, runs side by side."""
