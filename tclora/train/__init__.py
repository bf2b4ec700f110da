"""Training LoRA adapters: the loop of one adapter, and the engines that train several."""
