// A page that was opened from a file may not read its neighbours: search then lists titles without excerpts
if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false
