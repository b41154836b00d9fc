"""How fast training, scoring and rewriting are, beside what others would have used."""
