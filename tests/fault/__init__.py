"""The fault worker: speaks the real protocol with the real IO thread, without MLX, and fails on command.

`python -m tests.fault SPEC.json`. A request's answer is "tok0 tok1 tok2 …", one token per step, `answer_tokens` long
unless `max_tokens` is less. Faults come from the environment variable `LMX_FAULT` (JSON of `FaultPlan`, or @file with a
list of them) or from a marker in the last message of a request:

    [[abort]] [[abort 5]]    SIGABRT at once / after 5 tokens of this request; also segv, kill
    [[exit 87 5]]            last words and exit code 87 after 5 tokens
    [[raise]]                an exception in the engine, after as many tokens as named
    [[freeze]]               the engine hangs, the IO thread lives (the GIL is free)
    [[seize]]                the engine hangs and keeps the GIL: the whole process is silent
    [[garbage]]              unreadable frames to the gateway, then the answer
    [[wrong]]                frames of another incarnation to the gateway, then the answer
    [[twice]]                accepted four times, then the answer
    [[flood]]                200,000 frames to the gateway, then the answer
    [[huge]]                 a frame of 100 MiB to the gateway, then the answer
    [[io]]                   an exception in the IO thread
    [[leak]]                 descriptors until there are no more
    [[fork]]                 starts a process and aborts
    [[ballast 150]]          holds so many MB from now on, and answers
    [[drop]]                 holds no ballast any more, and answers
    [[tokens 500]]           an answer of 500 tokens
    [[think]]                the first five tokens are reasoning
    [[call]]                 the answer is a tool call, its text the argument
"""
