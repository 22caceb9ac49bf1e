"""The OpenAI-compatible server behind `blockffn serve`.

    $ blockffn serve -m model.gguf --port 8080

A request walks app.py (routes, key, sizes) -> schemas.py (types and ranges) -> prompts.py (text, messages, tools and
schemas to tokens and a grammar) -> service.py (admission, the engine's streams) -> forms.py (OpenAI's objects).
"""
