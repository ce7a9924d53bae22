"""The explorer: saved runs in the browser, one page per question; `emocircuits explore RUN` opens it."""
