"""A stand-in for TensorRT-LLM's executor, which cannot be installed where these tests run.

It is our own code, to the call order that was read in the engine's source and checked against its connector
manager: pages, an allocator with block reuse, ranks that get pickled metadata, chunked prefill, the overlap loop,
both cache managers. Its model is small and exact: what a token's KV must be follows from the tokens before it, and
the next token is a hash of all KV bytes that are really in the pages. A connector that breaks a rule of the contract
is told so by ``ContractBroken``; one that raises where the engine does not survive it, by ``EngineDied``.
"""
