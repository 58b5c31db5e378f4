"""The report of a study: one HTML file that needs nothing beside it, made from the result alone.

`document` puts it together, `figures` says which pictures suit a result, `drawing` draws them, `markup` knows HTML.
"""
