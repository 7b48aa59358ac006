// A reverse proxy in the shape of llama-swap's fast path, for comparison: it reads the body, takes `model` out of
// it, counts what is in flight for that model, and hands the request to httputil.ReverseProxy.
//
//	goproxy LISTEN UPSTREAM
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

type model struct {
	inFlight atomic.Int64
	proxy    *httputil.ReverseProxy
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: goproxy LISTEN UPSTREAM")
		os.Exit(2)
	}
	upstream, err := url.Parse(os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	proxy := httputil.NewSingleHostReverseProxy(upstream)
	proxy.FlushInterval = -1
	proxy.Transport = &http.Transport{
		MaxIdleConns:        4096,
		MaxIdleConnsPerHost: 4096,
		IdleConnTimeout:     90 * time.Second,
		DisableCompression:  true,
		DialContext:         (&net.Dialer{}).DialContext,
	}
	models := map[string]*model{"m": {proxy: proxy}}
	var lock sync.Mutex
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		var named struct {
			Model string `json:"model"`
		}
		if json.Unmarshal(body, &named) != nil || named.Model == "" {
			http.Error(w, "no model", http.StatusBadRequest)
			return
		}
		lock.Lock()
		m := models[named.Model]
		lock.Unlock()
		if m == nil {
			http.Error(w, "unknown model", http.StatusNotFound)
			return
		}
		m.inFlight.Add(1)
		defer m.inFlight.Add(-1)
		r.Body = io.NopCloser(bytes.NewReader(body))
		r.ContentLength = int64(len(body))
		m.proxy.ServeHTTP(w, r)
	}
	if err := http.ListenAndServe(os.Args[1], http.HandlerFunc(handler)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
