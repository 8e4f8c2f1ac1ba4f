"""From the name of a source to a table of articles: the Hub, files, MediaWiki dumps and their markup (design §3)."""
