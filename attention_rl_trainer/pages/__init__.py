"""What a run left behind into a page: one HTML file that opens anywhere, without a network.

`run` reads a run's folder, also one that is under way or broken; `curves`, `picks` and `intervals` turn it into what is
drawn; `page` writes the file. The page's own style and scripts are in `assets/`. Import from the modules: nothing here
loads a model or torch.
"""
