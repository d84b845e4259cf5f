"""Images, texts, sounds and clips as networks take them: opened in a fixed order, prepared, labelled, in batches."""
