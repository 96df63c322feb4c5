/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Called by connect, sendmsg, recvmsg and getpeername: what an enrolled pod asks of port 53 goes to the DNS
 * proxy, which listens in the pod's own network namespace; the answer comes from the server that was asked.
 *
 * The proxy has DNS_SLOTS ports in a namespace, half of them of either family. A server that is asked gets
 * one of them, for all sockets of the namespace: so the port says which server was meant, to the proxy and on
 * the way back, and a socket may talk to several servers at once.
 *
 * Reads `dns_listeners`; writes `dns_servers`. Fails open, to the server itself: where the proxy has not
 * listened here yet, has been silent for DNS_SILENCE_MS, or is gone (its socket is looked for), when more
 * servers are asked than there are slots, for a socket that is bound to a device, and for a server that is
 * known by its link alone.
 */
#pragma once

#include "choose.h"

#define DNS_PORT  bpf_htons(53)
#define LOOPBACK4 bpf_htonl(0x7f000001)
#define LOOPBACK6 bpf_htonl(1)

static __always_inline struct ip loopback(bool is_4)
{
	return is_4 ? ip_from_v4(LOOPBACK4) : (struct ip){ .word = { 0, 0, 0, LOOPBACK6 } };
}

static __always_inline bool dns_listens(struct bpf_sock_addr *ctx, bool is_4, __be16 port)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = sizeof(tuple.ipv4);
	struct bpf_sock *found;

	if (is_4) {
		tuple.ipv4.saddr = tuple.ipv4.daddr = LOOPBACK4;
		tuple.ipv4.dport = port;
	} else {
		tuple.ipv6.saddr[3] = tuple.ipv6.daddr[3] = LOOPBACK6;
		tuple.ipv6.dport = port;
		size = sizeof(tuple.ipv6);
	}
	if (ctx->protocol == IPPROTO_UDP)
		found = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		found = bpf_sk_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!found)
		return false;
	bpf_sk_release(found);
	return true;
}

/* The proxy's port for a server; 0: there is none. */
static __noinline __u32 dns_port_for(struct bpf_sock_addr *ctx, const struct destination *to)
{
	struct dns_key key = { .netns_cookie = bpf_get_netns_cookie(ctx) };
	struct dns_server wanted = { .address = to->address };
	__u64 now = bpf_ktime_get_ns();
	bool is_4 = ip_is_v4(&to->address);
	__u32 slot;

	for (slot = 0; slot < DNS_SLOTS; slot++) {
		struct dns_listener *listener;
		struct dns_server *server;

		key.slot = slot;
		listener = bpf_map_lookup_elem(&dns_listeners, &key);
		if (!listener || listener->is_6 == is_4 ||
		    now - listener->beat_ns > DNS_SILENCE_MS * 1000000ULL)
			continue;
		server = bpf_map_lookup_elem(&dns_servers, &key);
		if (!server) {
			bpf_map_update_elem(&dns_servers, &key, &wanted, BPF_NOEXIST);
			server = bpf_map_lookup_elem(&dns_servers, &key);
		}
		if (server && ip_equal(&server->address, &to->address))
			return listener->port;
	}
	return 0;
}

/* Which link is meant would be lost. */
static __always_inline bool is_link_local(const struct ip *address)
{
	return (address->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* True when a question to `to` goes to the proxy, which replaces it. */
static __noinline bool dns_redirect(struct bpf_sock_addr *ctx, struct destination *to)
{
	bool is_4 = ip_is_v4(&to->address);
	struct bpf_sock *sk = ctx->sk;
	__be16 port;

	if (to->port != DNS_PORT || !sk || sk->bound_dev_if || is_link_local(&to->address))
		return false;
	port = dns_port_for(ctx, to);
	if (!port || !dns_listens(ctx, is_4, port))
		return false;
	to->address = loopback(is_4);
	to->port = port;
	return true;
}

/* The server that the proxy answers for replaces it. False: it is not the proxy. */
static __noinline bool dns_restore(struct bpf_sock_addr *ctx, struct destination *from)
{
	bool is_4 = ip_is_v4(&from->address);
	struct ip own = loopback(is_4);
	struct dns_key key = {};
	__u32 slot;

	if (!ip_equal(&from->address, &own))
		return false;
	key.netns_cookie = bpf_get_netns_cookie(ctx);
	for (slot = 0; slot < DNS_SLOTS; slot++) {
		struct dns_listener *listener;
		struct dns_server *server;

		key.slot = slot;
		listener = bpf_map_lookup_elem(&dns_listeners, &key);
		if (!listener || listener->is_6 == is_4 || listener->port != from->port)
			continue;
		server = bpf_map_lookup_elem(&dns_servers, &key);
		if (!server)
			return false;
		from->address = server->address;
		from->port = DNS_PORT;
		return true;
	}
	return false;
}
