"""What a run writes down: ledger, metrics, health warnings, and the report that a person reads.

`recorder` collects what a step gives, `ledger` keeps a row per trajectory, `progress` and `identity` say how far a run
has come and which run it is; `summary`, `plots`, `heat_maps` and `console` show it. Import from the modules: this
package imports none of them, so that matplotlib, rich and transformers load only where they are used.
"""
