"""Training memories into a calibrated selector: the heads, means and temperature by which half a key finds its pair.

A query that is half of a key is one whose right answer is known without any label (design §5). Whatever heads find it,
with whatever means and temperature, will find what the policy asks for. Adapters are off; nothing here is trained.
"""
