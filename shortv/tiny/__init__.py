"""The bundled model: a small LLaVA trained from scratch on drawn scenes, with its data, recipe and benchmark."""
