"""What others see of a run: which of its files a push uploads, and the card that says what the adapter is.

`published` has the allow-list. `data` and `reproduction` say of a run what it was trained on and with which options;
`card` writes that, what training changed and what was measured into a model card; `trainer` does so at every save.
Nothing here knows the Hub.
"""
