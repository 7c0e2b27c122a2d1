"""Reports and training histories for people: terminal, Markdown, figures."""
