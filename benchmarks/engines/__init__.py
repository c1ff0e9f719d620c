"""One engine per file, each run as a process of its own in the environment that has it.

The process loads one model, then answers requests on its standard input, so that engines can take turns:
`engines.protocol` says how. Nothing here imports the project, except `engines.ours`.
"""
