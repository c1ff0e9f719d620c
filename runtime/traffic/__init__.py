"""Load on an artifact or on any OpenAI-compatible server, and what it shows: the client's side alone.

`workload` draws what is asked, `measure` asks it and keeps when what came, `metrics` makes numbers of that, `bench`
does all three. Questions go to a `Target`: `server.Server` over HTTP (`http_client`), or one of `local`, an artifact in
this process.
"""
