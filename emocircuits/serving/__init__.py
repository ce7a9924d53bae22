"""An OpenAI-compatible server in which every request names its own steerers. Needs `emocircuits[serve]`."""
