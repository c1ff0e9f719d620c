"""An OpenAI-compatible HTTP front: `optimize serve`, or `runtime.server.app.create_app` in a program of one's own.

Its libraries come with the extra `serve`; nothing outside this folder imports them.
"""
