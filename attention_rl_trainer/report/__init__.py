"""Turn the files and metrics of a run into what a person reads: plots, a summary, tables on the terminal.

`summary` reads the ledger and writes the report folder, `plots` draws it, `console` shows progress while a run lasts.
Import from the modules: this package imports none of them, so that matplotlib, rich and transformers load only where
they are used.
"""
