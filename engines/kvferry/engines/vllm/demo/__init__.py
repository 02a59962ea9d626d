"""``kvferry demo``: a real vLLM answers questions about a long document, with and without its KV cached.

`command` is the click command and tells the story in order; `model` makes the checkpoint, `server` runs the
engine as a process, `ask` is the client that measures, `report` prints the table and passes judgement.
`disaggregated` is the other story, ``kvferry demo --disaggregated``, and `handoff_report` its table.
"""
