"""An OpenAI-compatible server for one model, and a page to watch it."""
