"""The page a run leaves behind: one HTML file without scripts or network, the same in Markdown, and the data itself."""
