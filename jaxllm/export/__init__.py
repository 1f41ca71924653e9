"""A model as programs, parameters and a manifest that run without jaxllm: `python -m jaxllm.export`.

`build.export` writes a directory for a target (`targets/`, a file each), runs it in a fresh process, compares what
it computes with the live model, and moves it into place only then; `build.verify` repeats that later.
docs/export.md says what each target needs.
"""
